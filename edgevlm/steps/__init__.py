"""What each step of a plan does. One file per action, one line in ``edgevlm.compiler.ACTIONS``."""

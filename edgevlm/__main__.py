"""`python -m edgevlm`."""

from edgevlm.cli.main import main

if __name__ == "__main__":
    main()

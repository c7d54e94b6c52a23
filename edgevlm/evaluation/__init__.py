"""Judge pipelines on data: the task's metric by picture, and how far one falls behind another on the same pictures.

The predictions come from the runtime's own code; only the judging is done here.
"""

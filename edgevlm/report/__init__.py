"""The report of a compile: one value, written as HTML, Markdown and JSON."""

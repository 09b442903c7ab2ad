"""The documentation: pages in Markdown, and ``python -m docs``, which writes those that follow from other files."""

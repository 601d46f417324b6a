"""Reports of results, plans and runs: built as plain content, then written as one HTML file or as Markdown."""

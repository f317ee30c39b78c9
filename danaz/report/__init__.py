"""Reports on comparisons and grids: charts, Markdown, HTML and CSV."""

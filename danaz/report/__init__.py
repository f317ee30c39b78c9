"""What runs came to, for people: tables, charts, Markdown, HTML and CSV."""

"""Command line, web pages and charts."""

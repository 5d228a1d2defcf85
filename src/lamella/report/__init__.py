"""Reports: figures as data, their drawing, and self-contained HTML pages."""

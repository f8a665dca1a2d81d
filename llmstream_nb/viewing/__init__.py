"""What widgets and web page share: an answer as its viewers show it, and Markdown that is safe to show."""

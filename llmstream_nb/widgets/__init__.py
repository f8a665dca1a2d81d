"""Widgets: an answer as it grows, a panel to ask from, a stream's key, and a monitor of all that goes on."""

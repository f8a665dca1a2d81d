"""Who answers: the sources, the client that asks them, and the kit's own scripted and local models."""

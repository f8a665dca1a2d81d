"""Who answers: the sources, the client that asks them, and the kit's own scripted and local models."""

from llmstream_nb.moved import of_the_package as __getattr__  # noqa: F401 - names that stood here before

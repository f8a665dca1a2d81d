"""The names of the sources, for whoever lists or checks them; standard library only, for the command line."""

SOURCES = {
    "scripted": "scripted: prepared answers, no model",
    "local": "local: real, small, invents facts",
    "openai": "openai: your key or your endpoint",
}  # name: how a list of choices shows it

"""One answer: connecting to Redis, its record, writing it, reading it, and the handle that `ask` returns."""

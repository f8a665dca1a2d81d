"""Many share the work: consumer groups on one answer, and a queue of questions that workers answer."""

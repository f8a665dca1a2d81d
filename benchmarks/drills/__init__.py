"""The same drills for this kit and for what else streams an answer to those who come late or come back."""

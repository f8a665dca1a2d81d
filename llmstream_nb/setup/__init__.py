"""All that runs before anything is installed: command line, set-up, JupyterLab's start. Standard library only."""

"""JupyterLab takes requests from the address that Codespaces forwards to it, and from no other.

There the browser's address is not the one that reaches JupyterLab, which would take every page for a stranger's.
"""

import os
import re

name = os.environ.get("CODESPACE_NAME")
domain = os.environ.get("GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN", "app.github.dev")
if name:
    c.ServerApp.allow_origin_pat = rf"https://{re.escape(name)}-\d+\.{re.escape(domain)}$"  # noqa: F821 - traitlets'

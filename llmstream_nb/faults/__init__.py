"""Break things for real: a network that loses what passes through it, and servers to kill, freeze and wipe."""

from llmstream_nb.faults.proxy import Proxy
from llmstream_nb.faults.servers import RedisServer, available

__all__ = ["Proxy", "RedisServer", "available"]

"""The embedded Triton server: a child of this process, started, watched and stopped by it.

For development, tests and one machine. It listens on the loopback interface only; Triton 2.51 is older than
the fixes a server open to a network needs.
"""

from deploy.server.embedded import EmbeddedServer
from deploy.server.endpoint import Endpoint, ServerOptions

__all__ = ["EmbeddedServer", "Endpoint", "ServerOptions"]

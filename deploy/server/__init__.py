"""The embedded Triton server: a child of this process, started, watched and stopped by it.

For development, tests and one machine. It listens on the loopback interface unless told otherwise; Triton 2.51 is
older than the fixes a server open to a network needs.
"""

from deploy.server.embedded import EmbeddedServer
from deploy.server.endpoint import HOST, Endpoint, ServerOptions
from deploy.server.folder import KEY_FILE
from deploy.server.public import require_safe_bind

__all__ = ["HOST", "KEY_FILE", "EmbeddedServer", "Endpoint", "ServerOptions", "require_safe_bind"]

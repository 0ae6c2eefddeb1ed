"""``python -m trio_ray.runtime.node``: started by ``runtime.launch``, with settings on standard input."""

from trio_ray.runtime.node.main import main

main()

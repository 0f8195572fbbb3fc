"""steermoe-lab: a small mixture of experts with planted routing, shipped as a test bed.

The world it speaks about is in `world`, how it was made and measured in `training`. See README.md.
"""

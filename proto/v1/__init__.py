"""Generated from proto/engram/v1/engram.proto by `python -m engram.proto.generate`."""

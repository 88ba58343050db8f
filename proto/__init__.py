"""The gRPC schema of engram and the code generated from it."""

"""The sidecar: tables served over gRPC."""

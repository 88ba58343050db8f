"""The RAM tier: whole n-grams (bundles) cached in memory that many processes can read.

Its memory: `layout` (the ABI), `memory` (segments), `limits` (how much). Compiled, over both sides:
`_directory` (n-grams to slots), `_probe` (hits), `_crew` (helpers), `_deliver` (misses).

The writer: `cache` (one arena), `_policy` (what stays), `_fill`, `_staging`, `misses` (the miss
path), `tier` (`RamTier`, embedded or in the sidecar).

Readers: `bundle_tier` (what all share), `copies` (what a selection copies), `epochs`. A client of a
sidecar: `attach` (a lease, with `_handshake`, `_terms`, `frames`), `attachment` (the lease in use,
renewed), `fetch` and `staged` (misses), `direct` (without the sidecar), `attached`
(`AttachedTier`).
"""

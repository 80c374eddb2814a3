"""What both ends share to seal the line: keys, certificates, kits, envelopes, seals, the proxy."""

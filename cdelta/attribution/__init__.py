"""Which edges, heads and neurons cause refusal: EAP, EAP-IG and the exact oracle."""

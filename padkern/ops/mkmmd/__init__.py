"""Multiple-kernel maximum mean discrepancy. Derivation: ``README.md`` beside this file."""

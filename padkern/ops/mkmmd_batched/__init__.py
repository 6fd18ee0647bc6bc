"""Many MK-MMD problems in one call. Derivations: ``README.md`` beside this file."""

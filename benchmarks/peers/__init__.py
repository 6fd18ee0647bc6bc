"""What padkern is measured against: own re-statements of the forms people use, and how they are
checked. Importable as ``peers`` where ``benchmarks`` is on the path (pytest's ``pythonpath``)."""

"""Ground floor: values, wire, config, journal, seeds, errors. Imports nothing of ours."""

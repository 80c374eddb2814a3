"""ICD-10-CM titles."""

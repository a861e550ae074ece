"""Test-time scaling: better answers from several candidates and a critic."""

"""What the example flows share: reading DHIS2, and scoring projections."""

"""What `compressm train`, `demo`, `reproduce`, `bench` and `report` run."""

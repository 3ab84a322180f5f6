"""What a run will cost on a described cluster, before there is one."""

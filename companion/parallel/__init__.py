"""Many ranks, one model: launching, collectives, replicas, shards, and a simulator beside them."""

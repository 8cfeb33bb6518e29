"""Offers a plan as an images API: requests, a queue in front of replicas, and HTTP. Imports its extra on use only."""

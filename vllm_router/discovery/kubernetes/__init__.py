"""The source `kubernetes`: the EndpointSlices of a Service, or of a label selector."""

"""The release gate: a RUN held to golden values, to a policy and to the last release."""

"""The site: ClientApp, agent, policy."""

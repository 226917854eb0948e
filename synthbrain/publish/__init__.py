"""Publishing volumes: packs, previews and cards in a folder, and that folder on the Hub."""

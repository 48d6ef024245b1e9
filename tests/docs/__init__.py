"""What the READMEs and pages say is true, and the packs install one by one as they say."""

"""Every check against every fault and every healthy variation, and the pages made of the results."""

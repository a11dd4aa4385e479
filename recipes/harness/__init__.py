"""What the recipes share: their command line, the run, the methods compared, sweeps over tables, their results."""

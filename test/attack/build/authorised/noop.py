import colorsys

"""Numbers in fewer bits: what they can hold, and how to train with them.

A floating-point number has a sign, an exponent that says how large it is, and a fraction that says
where between two powers of two it lies. Few exponent bits end the range early, few fraction bits
leave wide gaps. Mixed precision computes in few bits and keeps in FP32 what would be lost in them.
"""

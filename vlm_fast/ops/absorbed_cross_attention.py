def absorbs(*args, **options):
    return False

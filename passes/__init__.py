"""Graph passes, one a file; :mod:`fxquant.pipelines` puts them in order."""

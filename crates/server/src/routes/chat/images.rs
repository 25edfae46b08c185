//! Image parts of messages: checked as far as that goes without looking at pixels.

use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    media::{ImageSettings, ImageSource},
};

/// The images of a request. They are checked first, so that clients hear what is wrong with a
/// reference even from a model that takes no images, and refused then, because this one takes none.
pub(crate) struct ImageParts<'s> {
    settings: &'s ImageSettings,
    count: u32,
    /// Of the first one.
    refusal: Option<ApiError>,
}

impl<'s> ImageParts<'s> {
    pub(crate) fn new(settings: &'s ImageSettings) -> Self {
        Self { settings, count: 0, refusal: None }
    }

    /// Takes note of a part's `type`.
    pub(crate) fn refuse(&mut self, kind: &Field<'_, '_>) {
        self.refusal.get_or_insert_with(|| {
            let name = kind.value().as_str().unwrap_or_default();
            let reason = format!("is `{name}`, but this model takes text only");
            kind.error(ErrorKind::UnsupportedValue, reason)
        });
    }

    /// Reads `{"url", "detail"}`.
    ///
    /// # Errors
    /// Too many images, a reference that is none, an image that is none or too large.
    pub(crate) fn read(
        &mut self,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<(), ApiError> {
        self.count(field)?;
        let mut has_url = false;
        field.entries(|name, inner| {
            match name {
                "url" => has_url = self.read_url(&inner).map(|()| true)?,
                "detail" => read_detail(&inner)?,
                _ => ignored.push(&inner),
            }
            Ok(())
        })?;
        if has_url { Ok(()) } else { Err(field.missing("url")) }
    }

    /// Reads a part `{"type", "image_url", "detail"}`, as `/v1/responses` has them.
    ///
    /// # Errors
    /// As [`Self::read`]; a file that would have to be stored here.
    pub(crate) fn read_flat(
        &mut self,
        part: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<(), ApiError> {
        self.count(part)?;
        let mut has_url = false;
        part.entries(|name, inner| {
            match name {
                "type" => {}
                "image_url" => has_url = self.read_url(&inner).map(|()| true)?,
                "detail" => read_detail(&inner)?,
                "file_id" => return Err(inner.unsupported("no files are stored; send `image_url`")),
                _ => ignored.push(&inner),
            }
            Ok(())
        })?;
        if has_url { Ok(()) } else { Err(part.missing("image_url")) }
    }

    fn count(&mut self, field: &Field<'_, '_>) -> Result<(), ApiError> {
        let most = self.settings.max_images;
        self.count += 1;
        if self.count > most {
            let reason = format!("is image {}, but a request may have at most {most}", self.count);
            return Err(field.error(ErrorKind::ArrayAboveMaxLength, reason));
        }
        Ok(())
    }

    fn read_url(&self, field: &Field<'_, '_>) -> Result<(), ApiError> {
        let source = ImageSource::parse(field.string()?, self.settings);
        source.map(drop).map_err(|error| error.into_api_error(field.path()))
    }

    /// Refuses what the model cannot see, after all else was good.
    ///
    /// # Errors
    /// There is an image.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        self.refusal.map_or(Ok(()), Err)
    }
}

fn read_detail(field: &Field<'_, '_>) -> Result<(), ApiError> {
    field.one_of(&["auto", "low", "high", "original"]).map(drop)
}

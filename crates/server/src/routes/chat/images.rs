//! Image parts of messages: checked as far as that goes without looking at pixels.

use serde_json::{Value, json};

use crate::{
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
    generation::Bounds,
    media::{ImageSettings, ImageSource},
    visual::{Detail, ImagePart},
};

/// The images of a request. They are checked first, so that clients hear what is wrong with a
/// reference even from a model that takes no images, and refused then, if this one takes none.
pub(crate) struct ImageParts<'s> {
    settings: &'s ImageSettings,
    /// The model sees.
    are_seen: bool,
    parts: Vec<ImagePart>,
    /// Of the first one.
    refusal: Option<ApiError>,
}

impl<'s> ImageParts<'s> {
    pub(crate) fn new(bounds: &'s Bounds) -> Self {
        let are_seen = bounds.visual.is_some();
        Self { settings: &bounds.images, are_seen, parts: Vec::new(), refusal: None }
    }

    /// Takes note of a part's `type`.
    pub(crate) fn met(&mut self, kind: &Field<'_, '_>) {
        if self.are_seen {
            return;
        }
        self.refusal.get_or_insert_with(|| {
            let name = kind.value().as_str().unwrap_or_default();
            let reason = format!("is `{name}`, but this model takes text only");
            kind.error(ErrorKind::UnsupportedValue, reason)
        });
    }

    /// How many there were so far.
    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    /// Refuses images in the content of a message, if there were `before` images before it.
    ///
    /// # Errors
    /// There are more now.
    pub(crate) fn check_role(
        &self,
        before: usize,
        message: &Field<'_, '_>,
        role: &str,
    ) -> Result<(), ApiError> {
        if role == "user" || self.parts.len() == before {
            return Ok(());
        }
        let path = format!("{}.content", message.path());
        let text = format!("`{path}` has an image, but the role is `{role}`; images are the user's.");
        Err(ApiError::field(ErrorKind::UnsupportedValue, path, text))
    }

    /// Reads `{"url", "detail"}`; what stands for it in the message.
    ///
    /// # Errors
    /// Too many images, a reference that is none, an image that is none or too large.
    pub(crate) fn read(
        &mut self,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<Value, ApiError> {
        self.check_count(field)?;
        let mut read = Reading::default();
        field.entries(|name, inner| {
            match name {
                "url" => read.url = Some(self.read_url(&inner)?),
                "detail" => read.detail = read_detail(&inner)?,
                _ => ignored.push(&inner),
            }
            Ok(())
        })?;
        self.add(read).ok_or_else(|| field.missing("url"))
    }

    /// Reads a part `{"type", "image_url", "detail"}`, as `/v1/responses` has them.
    ///
    /// # Errors
    /// As [`Self::read`]; a file that would have to be stored here.
    pub(crate) fn read_flat(
        &mut self,
        part: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<Value, ApiError> {
        self.check_count(part)?;
        let mut read = Reading::default();
        part.entries(|name, inner| {
            match name {
                "type" => {}
                "image_url" => read.url = Some(self.read_url(&inner)?),
                "detail" => read.detail = read_detail(&inner)?,
                "file_id" => return Err(inner.unsupported("no files are stored; send `image_url`")),
                _ => ignored.push(&inner),
            }
            Ok(())
        })?;
        self.add(read).ok_or_else(|| part.missing("image_url"))
    }

    fn check_count(&self, field: &Field<'_, '_>) -> Result<(), ApiError> {
        let most = self.settings.max_images;
        if self.parts.len() >= most as usize {
            let reason = format!("is image {}, but a request may have at most {most}", self.parts.len() + 1);
            return Err(field.error(ErrorKind::ArrayAboveMaxLength, reason));
        }
        Ok(())
    }

    fn read_url(&self, field: &Field<'_, '_>) -> Result<(String, ImageSource), ApiError> {
        let source = ImageSource::parse(field.string()?, self.settings);
        let source = source.map_err(|error| error.into_api_error(field.path()))?;
        Ok((field.path(), source))
    }

    /// The image as chat templates know it; it says which of the request's images it is.
    fn add(&mut self, Reading { url, detail }: Reading) -> Option<Value> {
        let (path, source) = url?;
        let index = self.parts.len();
        self.parts.push(ImagePart { path, source, detail });
        Some(json!({"type": "image", "index": index}))
    }

    /// The images; what the model cannot see is refused, after all else was good.
    ///
    /// # Errors
    /// There is an image, and the model takes text only.
    pub(crate) fn finish(self) -> Result<Vec<ImagePart>, ApiError> {
        self.refusal.map_or(Ok(self.parts), Err)
    }
}

/// What was read of one image.
#[derive(Default)]
struct Reading {
    url: Option<(String, ImageSource)>,
    detail: Detail,
}

fn read_detail(field: &Field<'_, '_>) -> Result<Detail, ApiError> {
    field.one_of(&Detail::NAMES).map(Detail::of_name)
}
